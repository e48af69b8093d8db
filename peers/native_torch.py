"""The Vision Transformer of vit.py in plain PyTorch: what Keras on PyTorch is measured against.

    python peers/native_torch.py --dataset synthetic --num-epochs 2

Same model, initial weights, pictures, order, augmentation, optimiser, figures, record, and exit
codes as `vit.py --keras-backend torch`; no Keras. Forward and backward pass are compiled, the
update is the fused AdamW kernel, and no step waits for the device.
"""

import sys
import time
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers import common  # noqa: E402

if __name__ == "__main__":  # --help and bad flags end here, before the slow import
    CONFIG = common.start(sys.argv[1:], __doc__.split("\n\n")[0], "torch")

_import_started = time.perf_counter()
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

IMPORT_SECONDS = common.IMPORT_SECONDS + time.perf_counter() - _import_started

# ---------------------------------------------------------------------------------------------
# The model


def dropout(x, rate, key):
    """Zero a share `rate` of x and scale the rest; nothing without a key, an int32 tensor.

    The mask is a hash of the element's number (`lowbias32` of C. Wellons' "Hash Prospector", with
    the key added before and between its rounds), which inductor fuses with what comes before and
    after. On a CPU the masks of torch.nn.functional.dropout were a third of a step.
    """
    if key is None or rate == 0:
        return x
    bits = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + key
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * 0x21F0AAAD
    bits = ((bits ^ (bits >> 15 & 0x1FFFF)) + key * 0x61C88647) * 0x735A2D97
    keep = (bits ^ (bits >> 15 & 0x1FFFF)) & 0x7FFFFFFF >= round(rate * 2**31)
    return torch.where(keep, x / (1 - rate), 0)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.rate = config.num_heads, config.attention_dropout
        width = config.num_heads * config.head_dim
        self.qkv = nn.Linear(config.projection_dim, 3 * width)
        self.out = nn.Linear(width, config.projection_dim)

    def forward(self, x, key):  # (batch, patches, dim)
        batch, patches, _ = x.shape
        qkv = self.qkv(x).view(batch, patches, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, patches, size) each
        if key is None or self.rate == 0:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
            x = dropout(scores.softmax(-1, dtype=torch.float32), self.rate, key).to(v.dtype) @ v
        return self.out(x.transpose(1, 2).reshape(batch, patches, -1))


class MLP(nn.Module):
    def __init__(self, width, units, rate):
        super().__init__()
        self.rate, widths = rate, (width, *units)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, units))

    def forward(self, x, keys):
        for layer in self.layers:
            x = dropout(F.gelu(layer(x)), self.rate, next(keys))
        return x


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.projection_dim, eps=1e-6)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.projection_dim, eps=1e-6)
        self.mlp = MLP(config.projection_dim, config.transformer_units, config.dropout)

    def forward(self, x, keys):
        x = x + self.attention(self.norm1(x), next(keys))
        return x + self.mlp(self.norm2(x), keys)


class ViT(nn.Module):
    """From pixels 0 to 255 (batch, 3, 32, 32) to logits (batch, classes); keys, int32 (dropouts,),
    mean training."""

    def __init__(self, config, mean, variance):
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.head_dropout, dim = config.head_dropout, config.projection_dim
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(variance**-0.5).float().view(3, 1, 1))
        self.positions = nn.Parameter(torch.empty(config.num_patches, dim))
        self.patches = nn.Linear(3 * config.patch_size**2, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.transformer_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        width = config.num_patches * dim
        self.head = MLP(width, config.mlp_head_units, config.head_dropout)
        self.logits = nn.Linear((width, *config.mlp_head_units)[-1], config.num_classes)

    def forward(self, pixels, keys=None):
        keys = repeat(None) if keys is None else iter(keys.unbind())
        batch, size, side = len(pixels), self.patch_size, self.image_size
        x = (pixels - self.mean) * self.scale
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        x = x.view(batch, 3, side // size, size, side // size, size).permute(0, 2, 4, 3, 5, 1)
        x = self.patches(x.reshape(batch, -1, 3 * size * size)) + self.positions
        for block in self.blocks:
            x = block(x, keys)
        x = dropout(self.norm(x).flatten(1), self.head_dropout, next(keys))
        return self.logits(self.head(x, keys))

    @torch.no_grad()
    def load_keras_weights(self, weights):
        """Take weights in the order and shapes of get_weights() of vit.py's model."""
        weights = (torch.as_tensor(array) for array in weights)

        def fill_norm(norm):
            norm.weight.copy_(next(weights))
            norm.bias.copy_(next(weights))

        def fill(*linears):
            for linear in linears:
                linear.weight.copy_(next(weights).T)
                linear.bias.copy_(next(weights))

        self.positions.copy_(next(weights))
        fill(self.patches)
        for block in self.blocks:
            attention = block.attention
            fill_norm(block.norm1)
            for kernel, bias in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)):
                kernel.copy_(next(weights).flatten(1).T)
                bias.copy_(next(weights).flatten())
            attention.out.weight.copy_(next(weights).flatten(0, 1).T)
            attention.out.bias.copy_(next(weights))
            fill_norm(block.norm2)
            fill(*block.mlp.layers)
        fill_norm(self.norm)
        fill(*self.head.layers, self.logits)


# ---------------------------------------------------------------------------------------------
# Augmentation


def resample(images, maps):
    """What harness.augment.apply_affine does: bilinear, mirrored at the border.

    images: float (batch, channels, side, side), square; maps: float32 (batch, 2, 2).
    """
    grid = F.affine_grid(F.pad(maps, (0, 1)), images.shape, align_corners=False)
    return F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)


# ---------------------------------------------------------------------------------------------
# Training and evaluation


def score(logits, labels):
    """Loss, correct, correct among the first five: (3, batch); fillers (label -1) count nothing."""
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    rank = (logits > logits.gather(1, labels.clamp(0)[:, None])).sum(1)
    return torch.stack([loss, (rank < 1).float(), (rank < 5).float()]) * (labels >= 0)


class Peer:
    backend, library = "native-torch", "torch"

    def __init__(self, config):
        on_gpu = torch.cuda.is_available()
        self.config, self.device = config, torch.device("cuda" if on_gpu else "cpu")
        self.gpu_name = torch.cuda.get_device_name() if on_gpu else None
        tf32 = config.precision == "tf32" and on_gpu
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.precision = config.precision if tf32 or config.precision != "tf32" else "float32"

    def build(self, mean, variance):
        torch.manual_seed(self.config.seed)
        self.model = ViT(self.config, mean, variance).to(self.device)
        blocks, head = self.config.transformer_layers, self.config.mlp_head_units
        self.dropouts = blocks * (1 + len(self.config.transformer_units)) + 1 + len(head)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            eps=1e-7,
            fused=True,
        )
        compile = torch.compile if self.config.jit_compile else lambda function, **_: function
        self.compute_loss = compile(self.compute_loss, fullgraph=True, dynamic=False)
        self.score_batch = compile(self.score_batch, fullgraph=True, dynamic=False)

    def load_keras_weights(self, weights):
        self.model.load_keras_weights(weights)

    def forward(self, pixels, keys=None):
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.model(pixels, keys).float()

    def make_batch(self, index, maps):
        """Pictures and labels by their indices. Not compiled with the model: inductor would make
        each resampled pixel anew for each of the four taps of the resizing that follows."""
        x = self.images[index].permute(0, 3, 1, 2).float()
        return x if maps is None else resample(x, maps), self.labels[index]

    def compute_loss(self, x, labels, keys):
        """A part's share of a batch's loss; all its figures, without a gradient."""
        logits = self.forward(x, keys)
        with torch.no_grad():
            figures = score(logits, labels).mean(1)
        return F.cross_entropy(logits, labels) / self.order.shape[1], figures

    def score_batch(self, images, labels):
        return score(self.forward(images.permute(0, 3, 1, 2).float()), labels).sum(1)

    def count_parameters(self):
        return sum(parameter.numel() for parameter in self.model.parameters())

    def count_flops(self):
        """Matrix products of one picture's forward pass, 2 a multiply-accumulate."""
        config, macs = self.config, 0
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):  # used once a patch, in the head once a picture
                is_head = name.startswith(("head.", "logits"))
                macs += module.weight.numel() * (1 if is_head else config.num_patches)
        scores = config.num_patches**2 * config.num_heads * config.head_dim
        return 2 * (macs + 2 * scores * config.transformer_layers)

    def place(self, images, labels):
        self.images = torch.from_numpy(images).to(self.device)
        self.labels = torch.from_numpy(labels).long().to(self.device)

    def create_matmul(self, size):
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        x = torch.randn(size, size, device=self.device).to(dtype)
        return lambda: x @ x

    def steps_per_call(self, steps):
        return 1

    def begin_epoch(self, order, maps):
        self.order = torch.from_numpy(order).to(self.device)
        self.maps = None if maps is None else torch.from_numpy(maps).to(self.device)
        self.sums = torch.zeros(3, device=self.device)

    def run(self, rows):
        for row in range(rows.start, rows.stop):
            maps = repeat(None) if self.maps is None else self.maps[row]
            for index, part_maps in zip(self.order[row], maps):
                keys = torch.randint(2**31, (self.dropouts,), dtype=torch.int32)
                batch = self.make_batch(index, part_maps)
                loss, figures = self.compute_loss(*batch, keys.to(self.device))
                loss.backward()
                self.sums += figures
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def read_epoch(self):
        return (self.sums / self.order[..., 0].numel()).tolist()

    @torch.no_grad()
    def evaluate(self, images, labels):
        sums = torch.zeros(3, device=self.device)
        for x, y in common.fill_batches(images, labels, self.config.batch_size):
            x, y = torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)
            sums += self.score_batch(x, y.long())
        return (sums / len(images)).tolist()

    @torch.no_grad()
    def predict(self, images):
        """Logits of a batch, NumPy."""
        logits = self.forward(torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float())
        return logits.cpu().numpy()

    def keep_weights(self):  # on the host, so as not to count as what training needs
        weights = self.model.state_dict()
        self.kept = {name: value.to("cpu", copy=True) for name, value in weights.items()}

    def restore_weights(self):
        self.model.load_state_dict(self.kept)

    def synchronize(self):
        if self.gpu_name:
            torch.cuda.synchronize()

    def device_peak_bytes(self):
        if not self.gpu_name:
            return None, "computed on the CPU, where device memory is host memory"
        return torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"


if __name__ == "__main__":
    sys.exit(common.main(Peer, CONFIG, IMPORT_SECONDS))

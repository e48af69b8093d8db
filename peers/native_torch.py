"""The Vision Transformer of vit.py in plain PyTorch: what Keras on PyTorch is measured against.

    python peers/native_torch.py --dataset synthetic --num-epochs 2

Same model, initial weights, pictures, order, augmentation, optimiser, figures, record, and exit
codes as `vit.py --keras-backend torch`; no Keras. Forward and backward pass are compiled, the
update is the fused AdamW kernel (which adds epsilon after the correction for the first steps, and
Keras before: what hardly has a gradient moves further in these), and no step waits for the device.
"""

import math
import sys
import time
import warnings
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.telemetry import HOST_MEMORY  # noqa: E402
from peers import common  # noqa: E402

if __name__ == "__main__":  # --help and bad flags end here, before the slow import
    CONFIG = common.start(sys.argv[1:], __doc__.split("\n\n")[0], "torch")

_import_started = time.perf_counter()
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # are not for float32
torch.set_flush_denormal(True)  # a CPU is slow with numbers below 1e-38, to which training comes
IMPORT_SECONDS = common.IMPORT_SECONDS + time.perf_counter() - _import_started

# ---------------------------------------------------------------------------------------------
# The model


def dropout(x, rate, key, shape=None):
    """Zero a share `rate` of x and scale the rest; nothing without a key, an int32 tensor. The mask
    is of another shape if given, as for a whole branch of a picture (drop path).

    The mask is a hash of the element's number (multipliers of `lowbias32`, C. Wellons' "Hash
    Prospector", with the key added before and between them), which inductor fuses with what comes
    before and after. On a CPU the masks of torch.nn.functional.dropout were a third of a step.
    """
    if key is None or rate == 0:
        return x
    shape = shape or x.shape
    bits = torch.arange(math.prod(shape), dtype=torch.int32, device=x.device).view(shape)
    bits = (bits + key) * 0x21F0AAAD
    bits = ((bits ^ bits >> 15) + key) * 0x735A2D97
    keep = (bits ^ bits >> 13) * 0x21F0AAAD & 0x7FFFFFFF >= round(rate * 2**31)
    return torch.where(keep, x * (1 / (1 - rate)), 0)


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
    def __init__(self, width, units, rate, last=F.gelu):
        super().__init__()
        self.rate, widths = rate, (width, *units)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, units))
        self.activations = [*[F.gelu] * (len(units) - 1), last]

    def forward(self, x, keys):
        for layer, activation in zip(self.layers, self.activations):
            x = dropout(activation(layer(x)), self.rate, next(keys))
        return x


class Stem(nn.ModuleList):
    """3x3 convolutions from pictures (batch, 3, side, side) to tokens (batch, patches, dim)."""

    def __init__(self, config):
        channels = zip((3, *config.stem_filters), config.stem_filters)
        super().__init__(nn.Conv2d(a, b, 3, padding=1) for a, b in channels)

    def forward(self, x):
        *halving, last = self
        for convolution in halving:
            x = convolution(x)  # a few percent faster than F.max_pool2d on a CPU in float32:
            x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
            x = F.relu(torch.maximum(x[..., ::2], x[..., 1::2]))
        return last(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.skips, self.skip_rate = config.drop_path > 0, config.drop_path_of(number)
        last = F.gelu if config.mlp_ratio is None else nn.Identity()
        self.norm1 = nn.LayerNorm(config.projection_dim, eps=1e-6)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.projection_dim, eps=1e-6)
        self.mlp = MLP(config.projection_dim, config.transformer_units, config.dropout, last)

    def add(self, x, branch, keys):
        if self.skips:
            branch = dropout(branch, self.skip_rate, next(keys), (len(x), 1, 1))
        return x + branch

    def forward(self, x, keys):
        x = self.add(x, self.attention(self.norm1(x), next(keys)), keys)
        return self.add(x, self.mlp(self.norm2(x), keys), keys)


class ViT(nn.Module):
    """From pixels 0 to 255 (batch, 3, 32, 32) to logits (batch, classes); keys, int32 (dropouts,),
    mean training."""

    def __init__(self, config, mean, variance):
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.head_dropout, self.pooling = config.head_dropout, config.pool
        dim = config.projection_dim
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(variance**-0.5).float().view(3, 1, 1))
        self.positions = nn.Parameter(torch.empty(config.num_tokens, dim))
        self.token = nn.Parameter(torch.empty(1, dim)) if config.pool == "token" else None
        self.stem = Stem(config) if config.stem == "conv" else None
        self.patches = None if self.stem else nn.Linear(3 * config.patch_size**2, dim)
        self.blocks = nn.ModuleList(Block(config, n) for n in range(config.transformer_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pool = nn.Linear(dim, 1) if config.pool == "attention" else None
        self.head = MLP(config.pooled_width, config.mlp_head_units, config.head_dropout)
        width = (config.pooled_width, *config.mlp_head_units)[-1]
        self.logits = nn.Linear(width, config.num_classes)

    def cut(self, x):
        """Pictures (batch, 3, side, side) to their patches' embeddings (batch, patches, dim)."""
        batch, size, side = len(x), self.patch_size, self.image_size
        x = x.view(batch, 3, side // size, size, side // size, size).permute(0, 2, 4, 3, 5, 1)
        return self.patches(x.reshape(batch, -1, 3 * size * size))

    def summarize(self, x):
        """Tokens (batch, tokens, dim) to one vector a picture."""
        if self.pooling == "attention":
            return (self.pool(x).softmax(1).to(x.dtype).transpose(1, 2) @ x).squeeze(1)
        if self.pooling == "token":
            return x[:, 0]
        return x.mean(1) if self.pooling == "mean" else x.flatten(1)

    def forward(self, pixels, keys=None):
        keys = repeat(None) if keys is None else iter(keys.unbind())
        x = (pixels - self.mean) * self.scale
        if x.shape[2] != self.image_size:
            x = F.interpolate(x, (self.image_size,) * 2, mode="bilinear", align_corners=False)
        x = self.stem(x) if self.stem else self.cut(x)
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x, keys)
        x = dropout(self.summarize(self.norm(x)), self.head_dropout, next(keys))
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

        for convolution in self.stem or ():
            convolution.weight.copy_(next(weights).permute(3, 2, 0, 1))
            convolution.bias.copy_(next(weights))
        self.positions.copy_(next(weights))
        if self.token is not None:
            self.token.copy_(next(weights))
        fill(*([] if self.stem else [self.patches]))
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
        fill(*([self.pool] if self.pool else []))
        fill(*self.head.layers, self.logits)


# ---------------------------------------------------------------------------------------------
# Augmentation


def resample(images, maps):
    """What harness.augment.apply_affine does: bilinear, mirrored at the border.

    images: float (batch, channels, side, side), square; maps: float32 (batch, 2, 2).
    """
    grid = F.affine_grid(F.pad(maps, (0, 1)), images.shape, align_corners=False)
    return F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)


def shift(images, maps, fill):
    """What harness.augment.apply_shift does: flips and moves by whole pixels, by one lookup.

    images: uint8 (batch, side, side, 3); maps: float32 (batch, 2, 3); fill: float32 (3,), what lies
    outside. Returns float32 (batch, side, side, 3).
    """
    side = images.shape[1]
    place = torch.arange(side, device=images.device)
    center = (side - 1) / 2
    x = (maps[:, 0, :1] * (place - center) + center + maps[:, 0, 2:]).round().int()[:, None, :]
    y = (place + maps[:, 1, 2:]).int()[:, :, None]
    inside = ((x >= 0) & (x < side) & (y >= 0) & (y < side))[..., None]
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    x, y = x.clamp(0, side - 1), y.clamp(0, side - 1)
    return torch.where(inside, images[picture, y, x].float(), fill)


# ---------------------------------------------------------------------------------------------
# Training and evaluation


def orthogonalize(x):
    """Matrices (number, rows, columns) with singular values of about 1, by Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for a, b, c in common.NEWTON_SCHULZ:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


class Muon:
    """Moves kernels; matrices of one shape are computed at once, in dtype."""

    def __init__(self, kernels, weight_decay, dtype):
        """kernels: by name; queries, keys and values in one are three matrices."""
        self.counts = [3 if "qkv" in name else 1 for name in kernels]
        self.kernels = list(kernels.values())
        self.weights = self.cut(kernel.detach() for kernel in self.kernels)
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]
        self.weight_decay, self.dtype = weight_decay, dtype
        self.groups = {}
        for number, weight in enumerate(self.weights):
            self.groups.setdefault(weight.shape, []).append(number)

    def cut(self, tensors):
        pairs = zip(tensors, self.counts)
        return [matrix for x, count in pairs for matrix in x.flatten(1).chunk(count)]

    @torch.no_grad()
    def step(self, rate):
        gradients = self.cut(kernel.grad for kernel in self.kernels)
        torch._foreach_mul_(self.momenta, common.MOMENTUM)
        torch._foreach_add_(self.momenta, gradients)
        moves = torch._foreach_add(gradients, self.momenta, alpha=common.MOMENTUM)
        torch._foreach_mul_(self.weights, 1 - rate * self.weight_decay)
        for shape, numbers in self.groups.items():
            found = orthogonalize(torch.stack([moves[n] for n in numbers]).to(self.dtype)).float()
            found *= rate * (common.STEP_LENGTH * math.sqrt(max(shape)))
            torch._foreach_sub_([self.weights[n] for n in numbers], found.unbind())


def score(logits, labels, smoothing=0.0):
    """Loss, correct, correct among the first five: (3, batch); fillers (label -1) count nothing."""
    loss = F.cross_entropy(
        logits, labels, ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
    rank = (logits > logits.gather(1, labels.clamp(0)[:, None])).sum(1)
    return torch.stack([loss, (rank < 1).float(), (rank < 5).float()]) * (labels >= 0)


class Peer:
    backend, library = "native-torch", "torch"

    def __init__(self, config):
        on_gpu = torch.cuda.is_available()
        self.config, self.device = config, torch.device("cuda" if on_gpu else "cpu")
        self.gpu_name = torch.cuda.get_device_name() if on_gpu else None
        allows_tf32 = config.precision != "float32" and on_gpu
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allows_tf32
        is_known = on_gpu or config.precision != "tf32"
        self.precision = config.precision if is_known else "float32"
        self.dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def build(self, mean, variance):
        torch.manual_seed(self.config.seed)
        self.model = ViT(self.config, mean, variance).to(self.device)
        self.fill = torch.tensor(mean, dtype=torch.float32, device=self.device).round()
        self.weights = list(self.model.parameters())
        self.averages = None
        if self.config.ema:
            self.averages = [weight.detach().clone() for weight in self.weights]
        decays, hidden = {True: [], False: []}, {}
        for name, weight in self.model.named_parameters():
            is_kernel = name.endswith("weight") and weight.ndim > 1
            is_hidden = is_kernel and name.split(".")[0] not in ("pool", "logits")
            if is_hidden and self.config.optimizer == "muon":
                hidden[name] = weight
            else:
                decays[is_kernel or not self.config.decay_kernels_only].append(weight)
        self.muon = Muon(hidden, self.config.weight_decay, self.dtype) if hidden else None
        decay = {True: self.config.weight_decay, False: 0.0}
        self.optimizer = torch.optim.AdamW(
            [{"params": some, "weight_decay": decay[key]} for key, some in decays.items() if some],
            betas=(0.9, self.config.beta_2),
            eps=1e-7,
            fused=True,
            capturable=self.gpu_name is not None,
        )
        compile = torch.compile if self.config.jit_compile else lambda function, **_: function
        self.compute_loss = compile(self.compute_loss, fullgraph=True, dynamic=False)
        self.score_batch = compile(self.score_batch, fullgraph=True, dynamic=False)
        if self.gpu_name:  # apart from the model: see make_batch
            self.make_batch = compile(self.make_batch, fullgraph=True, dynamic=False)
        self.sums, self.steps_done = torch.zeros(3, device=self.device), 0
        self.graph, self.given = None, None  # a step as a CUDA graph, and what it reads

    def load_keras_weights(self, weights):
        self.model.load_keras_weights(weights)

    def forward(self, pixels, keys=None):
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=is_mixed):
            return self.model(pixels, keys).float()

    def make_batch(self, index, maps):
        """Pictures and labels by their indices. Not compiled with the model: inductor would make
        each resampled pixel anew for each of the four taps of the resizing that follows."""
        x = self.images[index]
        if maps is not None and self.config.crop_padding:
            x, maps = shift(x, maps, self.fill), None
        x = x.permute(0, 3, 1, 2).float()
        return x if maps is None else resample(x, maps), self.labels[index]

    def compute_loss(self, x, labels, keys):
        """A part's share of a batch's loss; all its figures, without a gradient."""
        logits, smoothing = self.forward(x, keys), self.config.label_smoothing
        with torch.no_grad():
            figures = score(logits, labels, smoothing).mean(1)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss * (self.config.micro_batch_size / self.config.batch_size), figures

    def score_batch(self, images, labels):
        return score(self.forward(images.permute(0, 3, 1, 2).float()), labels).sum(1)

    def count_parameters(self):
        return sum(parameter.numel() for parameter in self.model.parameters())

    def count_flops(self):
        """Of one picture's forward pass."""
        names = ((name.split("."), weight) for name, weight in self.model.named_parameters())
        kernels = (
            (parts[0], int(parts[1]) if parts[0] == "stem" else 0, weight.numel())
            for parts, weight in names
            if parts[-1] == "weight" and weight.ndim > 1
        )
        return common.count_flops(self.config, kernels)

    def place(self, images, labels):
        self.images = torch.from_numpy(images).to(self.device)
        self.labels = torch.from_numpy(labels).long().to(self.device)

    def create_matmul(self, size):
        x = torch.randn(size, size, device=self.device).to(self.dtype)
        return lambda: x @ x

    def steps_per_call(self, steps):
        return 1  # no call waits for the one before

    def begin_epoch(self, order, maps, rates):
        keys = torch.randint(2**31, (*order.shape[:2], self.config.num_dropouts), dtype=torch.int32)
        arrays = order, maps, keys, rates
        self.epoch = [None if a is None else torch.as_tensor(a).to(self.device) for a in arrays]
        self.sums.zero_()

    def run(self, rows):
        for row in range(rows.start, rows.stop):
            batch = [None if array is None else array[row] for array in self.epoch]
            if not self.gpu_name or not self.config.jit_compile or self.steps_done < 2:
                self.step(*batch)
            elif self.graph is None:
                self.capture(batch)
                self.graph.replay()
            else:
                for kept, array in zip(self.given, batch):
                    if kept is not None:
                        kept.copy_(array)
                self.graph.replay()
            self.steps_done += 1

    def capture(self, batch):
        """Make a step one CUDA graph, which costs the host one start instead of hundreds. It reads
        its batch in `given`."""
        self.given = [None if array is None else array.clone() for array in batch]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(*self.given)

    def step(self, order, maps, keys, rate):
        """Train on a batch in parts: (parts, images), (parts, images, ...), (parts, dropouts)."""
        total = None
        for index, part_maps, part_keys in zip(order, repeat(None) if maps is None else maps, keys):
            batch = self.make_batch(index, part_maps)
            loss, figures = self.compute_loss(*batch, part_keys)
            # The fused kernel wants gradients laid out like their weights.
            gradients = [g.contiguous() for g in torch.autograd.grad(loss, self.weights)]
            if total is None:
                total = gradients
            else:
                torch._foreach_add_(total, gradients)
            self.sums += figures
        for weight, gradient in zip(self.weights, total):
            weight.grad = gradient
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.weights, self.config.clip_norm)
        if self.muon:
            self.muon.step(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averages:
            share = 1 - self.config.ema if self.steps_done else 1.0
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.weights, share)

    def read_epoch(self):
        return (self.sums / self.epoch[0][..., 0].numel()).tolist()

    @torch.no_grad()
    def swap_averages(self):
        """Exchange the weights for their averages, if there are any, or back."""
        for weight, average in zip(self.weights, self.averages or ()):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def evaluate(self, images, labels):
        sums = torch.zeros(3, device=self.device)
        self.swap_averages()
        for x, y in common.fill_batches(images, labels, self.config.micro_batch_size):
            x, y = torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)
            sums += self.score_batch(x, y.long())
        self.swap_averages()
        return (sums / len(images)).tolist()

    @torch.no_grad()
    def predict(self, images):
        """Logits of a batch, NumPy."""
        logits = self.forward(torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float())
        return logits.cpu().numpy()

    def keep_weights(self):  # on the host, so as not to count as what training needs
        self.kept = [w.detach().to("cpu", copy=True) for w in self.averages or self.weights]

    @torch.no_grad()
    def restore_weights(self):
        for weight, kept in zip(self.averages or self.weights, self.kept):
            weight.copy_(kept)

    def synchronize(self):
        if self.gpu_name:
            torch.cuda.synchronize()

    def device_peak_bytes(self):
        if not self.gpu_name:
            return None, HOST_MEMORY
        return torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"


if __name__ == "__main__":
    sys.exit(common.main(Peer, CONFIG, IMPORT_SECONDS))

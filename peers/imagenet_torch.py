"""ViT-B/16 and ResNet-50 in plain PyTorch, their state dicts named as torchvision's: what serving
by Keras on PyTorch is measured against (`latency.py --native`).
"""

import math
import os

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) / math.sqrt(dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):  # (batch, tokens, dim)
        batch, tokens, dim = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv)  # (batch, heads, tokens, size)
        return self.out_proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class EncoderBlock(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(  # of torchvision's five parts two drop units in training
            *(nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))
        )

    def forward(self, x):
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, tokens, dim, depth, heads, hidden):
        super().__init__()
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        blocks = {f"encoder_layer_{i}": EncoderBlock(dim, heads, hidden) for i in range(depth)}
        self.layers = nn.ModuleDict(blocks)
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = x + self.pos_embedding
        for block in self.layers.values():
            x = block(x)
        return self.ln(x)


class VisionTransformer(nn.Module):
    """From normalised pixels (batch, 3, size, size) to logits; by default ViT-B/16."""

    def __init__(self, size=224, patch=16, dim=768, depth=12, heads=12, hidden=3072, classes=1000):
        super().__init__()
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.conv_proj = nn.Conv2d(3, dim, patch, patch)
        self.encoder = Encoder((size // patch) ** 2 + 1, dim, depth, heads, hidden)
        self.heads = nn.Sequential()
        self.heads.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return self.heads(self.encoder(x)[:, 0])


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = self.downsample(x) if self.downsample else x
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet50(nn.Module):
    """From normalised pixels (batch, 3, 224, 224) to logits."""

    def __init__(self, classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3)), 1):
            stage = []
            for block in range(blocks):
                stride = 2 if number > 1 and block == 0 else 1
                stage.append(Bottleneck(inputs, width, stride))
                inputs = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


MODELS = {"vit-b16": VisionTransformer, "resnet50": ResNet50}
# On a CPU weights that are constants are put once into the order of their products: convolutions
# gain a third by that, while a Vision Transformer's products lose a quarter. With
# TORCHINDUCTOR_FREEZING=0 in the environment none are: torch.compile as it is.
FREEZING = {"resnet50"} if os.environ.get("TORCHINDUCTOR_FREEZING") != "0" else set()


def create_forward(name, mean, variance, precision):
    """(a compiled function from uint8 pixels (batch, 224, 224, 3) on the device to logits, number
    of parameters)"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS[name]().eval().to(device, memory_format=torch.channels_last)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    mean = torch.tensor(mean, device=device).view(3, 1, 1)
    scale = torch.tensor(variance, device=device).view(3, 1, 1).rsqrt()

    mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs
    torch._inductor.config.freezing = mode is None and name in FREEZING

    @torch.compile(fullgraph=True, dynamic=False, mode=mode)
    def compute(pixels):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model((pixels.permute(0, 3, 1, 2).float() - mean) * scale).float()

    def forward(pixels):
        with torch.no_grad():
            return compute(pixels)

    return forward, sum(parameter.numel() for parameter in model.parameters())

"""torchvision's Faster R-CNN in torch, module by module, under the names of its tensors."""

import torch
from torch import nn
from torch.nn import functional


class FrozenNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        mean, var, weight, bias = (
            each[None, :, None, None]
            for each in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) / torch.sqrt(var + self.epsilon) * weight + bias


class Bottleneck(nn.Module):
    """Version 1.5: the stride is that of the 3 x 3 convolution."""

    def __init__(self, before, width, stride, epsilon):
        super().__init__()
        inner = width // 4
        sizes = ((before, inner, 1, 1), (inner, inner, 3, stride), (inner, width, 1, 1))
        for i, (a, b, size, step) in enumerate(sizes, 1):
            conv = nn.Conv2d(a, b, size, stride=step, padding=size // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", FrozenNorm(b, epsilon))
        if stride > 1 or before != width:
            project = nn.Conv2d(before, width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(project, FrozenNorm(width, epsilon))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class Body(nn.Module):
    def __init__(self, depths, widths, stem, epsilon):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenNorm(stem, epsilon)
        before = stem
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(before, width, 2 if i and not j else 1, epsilon))
                before = width
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            maps.append(x)
        return maps


class Pyramid(nn.Module):
    def __init__(self, widths, width):
        super().__init__()
        inner = [nn.Sequential(nn.Conv2d(each, width, 1)) for each in widths]
        layer = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1)) for _ in widths]
        self.inner_blocks, self.layer_blocks = nn.ModuleList(inner), nn.ModuleList(layer)

    def forward(self, maps):
        last, outs = 0, []
        for x, inner, layer in reversed(
            [*zip(maps, self.inner_blocks, self.layer_blocks, strict=True)]
        ):
            up = functional.interpolate(last, size=x.shape[2:]) if outs else 0
            last = inner(x) + up
            outs.insert(0, layer(last))
        return [*outs, functional.max_pool2d(outs[-1], 1, 2)]


class Head(nn.Module):
    def __init__(self, width, anchors):
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(width, width, 3, padding=1)))
        self.cls_logits = nn.Conv2d(width, anchors, 1)
        self.bbox_pred = nn.Conv2d(width, 4 * anchors, 1)

    def forward(self, x):
        """Logits (B, A) and deltas (B, A, 4), row by row, anchors of a place together."""
        x = torch.relu(self.conv(x))
        logits, deltas = self.cls_logits(x), self.bbox_pred(x).unflatten(1, (-1, 4))
        return logits.permute(0, 2, 3, 1).flatten(1), deltas.permute(0, 3, 4, 1, 2).flatten(1, 3)


def module(**parts):
    return nn.ModuleDict(parts)


def torchvision(
    depths=(3, 4, 6, 3),
    widths=(256, 512, 1024, 2048),
    stem=64,
    width=256,
    hidden=1024,
    classes=91,
    epsilon=1e-5,
):
    box_head = {"fc6": nn.Linear(width * 49, hidden), "fc7": nn.Linear(hidden, hidden)}
    predictor = {
        "cls_score": nn.Linear(hidden, classes),
        "bbox_pred": nn.Linear(hidden, 4 * classes),
    }
    return module(
        backbone=module(body=Body(depths, widths, stem, epsilon), fpn=Pyramid(widths, width)),
        rpn=module(head=Head(width, 3)),
        roi_heads=module(box_head=module(**box_head), box_predictor=module(**predictor)),
    )


def box_branch(theirs, pooled):
    """Probabilities' logits (N, K) and deltas (N, K, 4) of regions (N, C, 7, 7)."""
    head, predictor = theirs["roi_heads"]["box_head"], theirs["roi_heads"]["box_predictor"]
    hidden = torch.relu(head["fc7"](torch.relu(head["fc6"](pooled.flatten(1)))))
    return predictor["cls_score"](hidden), predictor["bbox_pred"](hidden).unflatten(1, (-1, 4))

"""A small ResNet with batch norm on synthetic textures, under autocast and GradScaler.

python -m examples.cnn --amp
"""

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodual import Dualized, Rule, metrize

CLASSES = 16


class Block(nn.Module):
    """x + f(x), halving the resolution where the channels change."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.skip = (
            nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + y)


class ResNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width), Block(width, 2 * width), Block(2 * width, 4 * width)
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def textures(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy stripes (count, 3, 16, 16), and their directions, the classes (count,)."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=g)
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=g)
    angle = (math.pi / CLASSES * label)[:, None, None]
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    stripes = torch.sin(1.5 * (x * angle.cos() + y * angle.sin()) + phase)
    return stripes[:, None] + 2 * torch.randn(count, 3, 16, 16, generator=g), label


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; return the test loss before and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lr", type=float, default=2.0, help="modular norm of one step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--amp",
        action="store_true",
        help="16-bit forward pass and scaled loss: float16 on a GPU, bfloat16 on a CPU",
    )
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = ResNet().to(device)
    # The head's outputs are logits; every other norm is that of its module's type.
    norm = metrize(model, rules=[Rule("head.weight", role="head")])
    optimizer = Dualized(model, lr=args.lr, norm=norm, beta=0.8)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    scaler = torch.amp.GradScaler(device, enabled=args.amp)
    autocast = torch.autocast(
        device, torch.float16 if device == "cuda" else torch.bfloat16, enabled=args.amp
    )
    print(norm.receipt())

    def evaluate() -> tuple[float, float]:
        x, y = (t.to(device) for t in textures(512, seed=-1))
        model.eval()
        with torch.no_grad(), autocast:
            logits = model(x).float()
        model.train()
        return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()

    before, _ = evaluate()
    for step in range(args.steps):
        x, y = (t.to(device) for t in textures(64, seed=step))
        with autocast:
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # leaves out steps whose gradients overflowed
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")
    after, accuracy = evaluate()
    print(f"test loss {before:.3f} → {after:.3f}, accuracy {accuracy:.1%}")
    return before, after


if __name__ == "__main__":
    main()

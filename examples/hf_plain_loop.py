"""GPT-2 or Llama from transformers in a plain loop.

With gradient accumulation, torch's learning rate schedulers, and torch.compile.

python -m examples.hf_plain_loop --model llama --accumulate 2
"""

from collections.abc import Sequence

import torch

from examples.tiny import BATCH, language_model, loss_of, options, train_and_test, windows
from nanodual import Dualized


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; return the test loss before and after."""
    parser = options(__doc__, model="gpt2", lr=2.0, steps=150)
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", help="torch.compile the model, by this backend"
    )
    args = parser.parse_args(argv)

    train, test = train_and_test()
    model = language_model(args.model)
    optimizer = Dualized(model, lr=args.lr, beta=0.8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, 1 - step / args.steps)
    )
    print(optimizer.norm.receipt())
    forward = torch.compile(model, backend=args.compile) if args.compile else model

    before = loss_of(model, test)
    for step in range(args.steps):
        for x in windows(train, BATCH * args.accumulate, seed=step).split(BATCH):
            loss = forward(input_ids=x, labels=x).loss
            (loss / args.accumulate).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")
    # A step reports a gradient of the step before it that was not finite; this, of the last step.
    optimizer.check_finite()
    after = loss_of(model, test)
    print(f"test loss {before:.3f} → {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()

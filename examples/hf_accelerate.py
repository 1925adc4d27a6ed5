"""GPT-2 or Llama under Accelerate: gradient accumulation, mixed precision, several processes.

python -m examples.hf_accelerate --precision bf16 --accumulate 2
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from examples.tiny import BATCH, language_model, loss_of, options, train_and_test, windows
from nanodual import Dualized


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; return the test loss before and after."""
    parser = options(__doc__, model="llama", lr=2.0, steps=100)
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    args = parser.parse_args(argv)

    accelerator = Accelerator(
        mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate
    )
    train, test = train_and_test()
    model = language_model(args.model)
    optimizer = Dualized(model, lr=args.lr, beta=0.8)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=args.steps
    )
    data = windows(train, args.steps * args.accumulate * BATCH)
    # A tensor is a dataset.
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)  # type: ignore[arg-type]
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    before = loss_of(model, test.to(accelerator.device))
    for i, x in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(input_ids=x, labels=x).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if i % 25 == 0:
            accelerator.print(f"batch {i:4}  loss {loss.item():.3f}")
    after = loss_of(model, test.to(accelerator.device))
    accelerator.print(f"test loss {before:.3f} → {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()

"""GPT-2 or Llama in the Hugging Face Trainer, with its checkpoints.

python -m examples.hf_trainer; python -m examples.hf_trainer --resume
"""

from collections.abc import Sequence

from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from examples.tiny import BATCH, language_model, loss_of, options, train_and_test, windows
from nanodual import Dualized


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; return the test loss before and after."""
    parser = options(__doc__, model="llama", lr=2.0, steps=100)
    parser.add_argument(
        "--out",
        default="runs/hf_trainer",
        help="folder of the checkpoints, at half time and at the end",
    )
    parser.add_argument("--resume", action="store_true", help="from the folder's last checkpoint")
    args = parser.parse_args(argv)

    train, test = train_and_test()
    model = language_model(args.model)
    optimizer = Dualized(model, lr=args.lr, beta=0.8)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    settings = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        # The size of Dualized's steps does not depend on the gradient's. Its own max_grad_norm
        # weighs gradients in the momentum.
        max_grad_norm=0,
        save_steps=max(1, args.steps // 2),
        logging_steps=25,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    examples = [{"input_ids": x, "labels": x} for x in windows(train, 100 * BATCH)]
    trainer = Trainer(
        model,
        settings,
        train_dataset=examples,  # type: ignore[arg-type] - a list is a dataset
        optimizers=(optimizer, scheduler),
    )
    before = loss_of(model, test)
    trainer.train(resume_from_checkpoint=args.resume)
    after = loss_of(model, test)
    print(f"test loss {before:.3f} → {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()

"""Train a language model on what a hidden reader likes, in three stages: `python train_rlhf.py --help`."""


def main() -> None:
    """Parse the flags and train."""
    from minirl.rlhf import RLHFConfig, train
    from minirl.scripts.train import run_training

    about = "Learn to write, then what people like, then to write that, by PPO; without flags, reviews."
    run_training("rlhf", RLHFConfig, train, about)


if __name__ == "__main__":
    main()

"""Train a language model on what a hidden reader likes, in three stages: `python train_rlhf.py --help`."""


def main() -> None:
    """Parse the flags and train."""
    from minirl.rlhf import RLHFConfig, train
    from minirl.scripts.train import run_training

    about = "Learn to write, learn what is liked, and write what is liked, by PPO; without flags, on restaurant reviews."
    run_training("rlhf", RLHFConfig, train, about)


if __name__ == "__main__":
    main()

"""Train Double DQN, on CartPole unless told otherwise: `python train_dqn.py --help`."""


def main() -> None:
    """Parse the flags and train."""
    # Imported here, not above: environment workers load this file too, and must not load torch.
    from minirl.dqn import DQNConfig, train
    from minirl.scripts.train import run_training

    run_training("dqn", DQNConfig, train, "Train Double DQN; without flags, on CartPole.")


if __name__ == "__main__":
    main()

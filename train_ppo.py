"""Train PPO, on Pong unless told otherwise: `python train_ppo.py --help`."""


def main() -> None:
    """Parse the flags and train."""
    # Imported here, not above: environment workers load this file too, and must not load torch.
    from minirl.ppo import PPOConfig, train
    from minirl.scripts.train import run_training

    run_training("ppo", PPOConfig, train, "Train PPO; without flags, on Pong with the source notebook's settings.")


if __name__ == "__main__":
    main()

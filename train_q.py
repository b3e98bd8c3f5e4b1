"""Train tabular Q-learning, on the source notebook's grid unless told otherwise: `python train_q.py --help`."""


def main() -> None:
    """Parse the flags, train and print the table."""
    from minirl.q_learning import QLearningConfig, train
    from minirl.results.tables import describe
    from minirl.runs.flags import errors_in_one_line
    from minirl.runs.progress import answer
    from minirl.scripts.train import run_training

    about = "Train tabular Q-learning; without flags, on the source notebook's 3x3 grid with its settings."
    config, q_table = run_training("q_learning", QLearningConfig, train, about)
    with errors_in_one_line():
        answer(describe(q_table, config.env_id))


if __name__ == "__main__":
    main()

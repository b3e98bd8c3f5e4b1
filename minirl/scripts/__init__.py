"""What `train_ppo.py` and its like do: flags into a config, training, and the report at the end."""

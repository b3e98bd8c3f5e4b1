"""What the scripts such as `train_ppo.py` do: flags into a config, training, and the report at the end."""

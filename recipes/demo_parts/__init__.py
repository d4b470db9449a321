"""What the demo is made of: its model, data and Trainer, the files of its first stage, and its words."""

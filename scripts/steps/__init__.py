"""What measurements of training steps share: a Trainer's step by hand, its time, and what others would use."""

"""The forms of a training step, and the rules that choose one."""

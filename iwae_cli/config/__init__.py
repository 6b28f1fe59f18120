"""From plain nested dicts to checked objects."""

"""From a base model to a helpful one: reinforcement learning from rewards (PPO)."""

"""What the paper asks for: its experiments, notebooks, plan and demonstration."""

"""What the stages share: run-directory and data contracts, the reward model, the report, the compiled evaluator."""

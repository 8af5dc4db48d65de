"""What the planner shares with the rooms about it: how much the package computes at once, where it chooses so itself,
and the arguments that a recipe may leave to the planner.

Plain Python: no torch, and nothing else of the package, so that every module can keep to them.
"""

PPO_LOGITS = 1 << 23
"""Logits that PPO computes at once; more tokens go in parts."""
EVALUATION_LOGITS = 1 << 25
"""Logits held at a time while held-out rows are scored; with a vocabulary of 128k, of 261 tokens."""
EVALUATION_TOKENS = 1536
"""Tokens of a batch of held-out rows."""
ANSWER_TOKENS = 4096
"""Tokens of a batch of questions, their answers included."""
NEW_TOKENS = 32
"""Of an answer to a question, at most."""
TOOL_TOKENS = 128
"""The same where the answer may call tools, whose replies count too."""
HELD_OUT_ANSWERS = 4
"""Sampled by PPO to each held-out prompt: most of what one answer's reward tells of a policy is the luck of the
draw."""
SHARD_BYTES = 2 << 30
"""Of a file of merged weights."""
AUTO = "auto"
BATCH, CHECKPOINTING, LENGTH = "per_device_train_batch_size", "activation_checkpointing", "max_length"
AUTO_ARGUMENTS = (BATCH, CHECKPOINTING, LENGTH)
"""The arguments whose value may be left to the planner."""
TOKENS = "per_device_train_batch_tokens"
"""Our own word for a batch of as many rows as these tokens hold, in place of BATCH."""

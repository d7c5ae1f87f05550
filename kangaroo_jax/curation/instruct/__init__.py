"""Makes the instruction tuning set: conversations about clips from their captions."""

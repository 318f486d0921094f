"""Text becomes sequences of token ids: tokenised, packed, numbered and masked."""

"""What the package refuses, and the sentences that it does that with."""

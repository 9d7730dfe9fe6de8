"""Models: find and load them (load), add and save adapters (adapters), run them to hidden states (forward), generate."""

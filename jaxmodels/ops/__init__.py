"""The mathematics: pure functions of arrays, no parameters, no Flax."""

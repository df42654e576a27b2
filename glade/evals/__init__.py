"""Measuring a trained model: what it is told, how, and with which denominators."""

"""The harder world: up to six objects with fills, overlaps and written words, scenes behind them.

Scenes and their pictures, what is said of them in every task, and a checker that reads pictures back.
"""

"""Environments in which an agent acts: the one that ships, Gymnasium's, and recordings of both."""

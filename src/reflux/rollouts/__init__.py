"""Rollouts of text attempts: turns are generated and an environment answers, until the attempt is
finished.
"""

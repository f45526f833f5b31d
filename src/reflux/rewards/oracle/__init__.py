"""A server of the chat protocol that solves and judges the shipped arithmetic tasks by rule, without a
model.
"""

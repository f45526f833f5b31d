"""Flow-matching image models as the library sees them: a velocity at a state, a time and a prompt. Built on
diffusers.
"""

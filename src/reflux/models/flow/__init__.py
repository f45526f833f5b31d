"""Flow-matching image models, which give a velocity at a state, a time and a prompt. Built on diffusers."""

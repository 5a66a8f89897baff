"""What the papers are about: losses, objectives, samplers, the BatchFormer's windows, the teacher."""

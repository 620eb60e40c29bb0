"""One card a method: its front matter is the registry, its text what it costs and what it earned."""

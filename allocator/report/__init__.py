"""Tables and documents of what the other parts computed: plain data in, rich renderables or dictionaries out.

Import from the modules: `gamma plan` answers in less than a second because it loads its own tables alone.
"""

"""The planner: what a run needs and how long it takes, before it is started. Nothing here runs a model.

shapes          sizes of the frozen encoders, published or read from a folder
workload        one image's way through the system, in tokens
costs           FLOPs and bytes an image, item by item
weights         every weight of a rank by name, and what it costs in bytes
memory          bytes a rank holds, item by item
communication   bytes and seconds on the wire
calibration     efficiencies, and the published runs they come from
step            seconds of a step in one layout
layouts         which layouts there are, which are feasible, how they rank
levers          what each design choice saves
report          tables for the terminal, JSON, Markdown
"""

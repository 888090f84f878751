"""GenEval, DPG-Bench, WISE and ImgEdit: what their official scorers read, and what they write.

generate   a checkpoint -> the folder that the official scorer reads
score      such a folder -> scores, where the judge can run here
read       what an official scorer wrote -> scores with intervals
"""

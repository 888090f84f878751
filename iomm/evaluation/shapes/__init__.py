"""The shapes world: a benchmark of text-to-image generation that needs no judge.

A scene is data (`scene`), drawn from (seed, index) (`sampling`), with a prompt in one of GenEval's six
categories (`prompts`). What a generated picture shows is found again by an exact detector (`detector`) and
judged by GenEval's rule (`judge`), or against the target of an edit (`edits`).
"""

"""Where a student still loses against its teacher: measures on arrays, and the page that shows them.

The measures (``detections``, ``segmentation``, ``calibration``, ``agreement``) take arrays and give dicts; ``sources``
and ``gather`` know models and data; ``advice`` has the rules; ``plots``, ``pictures`` and ``page`` show what was found.
"""

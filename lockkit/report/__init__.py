"""Reports: results of lock, verify and attack as one HTML page without external resources, as Markdown and as JSON.

from lockkit.report.run import write_report
"""

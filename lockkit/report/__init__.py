"""Reports: results of lock, verify and attack as one page that opens offline, as Markdown and as JSON.

from lockkit.report.run import write_report
"""

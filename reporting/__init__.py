"""What people look at: panels, figures, tables, comparisons and pages."""

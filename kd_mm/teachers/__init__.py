"""``teacher=``: where a teacher comes from, what it is fed, how it runs."""

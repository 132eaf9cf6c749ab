//go:build unix

package testutil

import "syscall"

// Stop suspends the child (SIGSTOP): to its peers it is alive, and does nothing.
func (c *Child) Stop() {
	c.t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		c.t.Fatalf("child %s: %v", c.name, err)
	}
}

// Continue lets a child that Stop suspended go on.
func (c *Child) Continue() {
	c.t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		c.t.Fatalf("child %s: %v", c.name, err)
	}
}

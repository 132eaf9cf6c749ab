//go:build linux

package main

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"time"
)

// A console keeps the last lines that the machine prints, to explain its death. It is safe for concurrent use.
type console struct {
	verbose io.Writer // takes each line, with the time; nil: nobody does
	start   time.Time

	mu      sync.Mutex
	partial []byte
	lines   []string
}

const (
	consoleLines = 100
	consoleWidth = 4096 // longer lines are broken
)

// Control sequences, which firmware and kernel send to terminals.
var escapes = regexp.MustCompile(`\x1b(\[[0-9;?]*[a-zA-Z]|.)|\r`)

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.partial = append(c.partial, p...)
	for {
		i := bytes.IndexByte(c.partial, '\n')
		if i < 0 && len(c.partial) < consoleWidth {
			return len(p), nil
		}
		if i < 0 || i >= consoleWidth {
			i = consoleWidth - 1
		}
		line := strings.TrimRight(escapes.ReplaceAllString(string(c.partial[:i+1]), ""), "\n")
		c.partial = append(c.partial[:0], c.partial[i+1:]...)
		c.lines = append(c.lines, line)
		if n := len(c.lines) - consoleLines; n > 0 {
			c.lines = append(c.lines[:0], c.lines[n:]...)
		}
		if c.verbose != nil {
			fmt.Fprintf(c.verbose, "[%7.2f] %s\n", time.Since(c.start).Seconds(), line)
		}
	}
}

// tail returns the last lines, indented, with a heading; or nothing if there are none.
func (c *console) tail() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := c.lines
	if len(c.partial) > 0 {
		lines = append(lines[:len(lines):len(lines)], string(c.partial))
	}
	if len(lines) == 0 {
		return ""
	}
	return "\nthe last lines of the machine's console:\n    " + strings.Join(lines, "\n    ")
}

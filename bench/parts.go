package main

import (
	"fmt"
	"os"
	"strings"
)

// A part is what one of the commands writes into the results file, between two lines of its own. None touches another's, and
// what `make bench` writes is what is left.
type part struct{ begin, end string }

var (
	rxePart  = part{"<!-- written by make bench-vm, to the end of this part -->", "<!-- end of what make bench-vm has written -->"}
	mlx5Part = part{"<!-- written by make bench-mlx5, to the end of this part -->", "<!-- end of what make bench-mlx5 has written -->"}
	netPart  = part{"<!-- written by make bench-net, to the end of this part -->", "<!-- end of what make bench-net has written -->"}
)

// of returns the part in a results file, with its lines; "" if there is none.
func (p part) of(text string) string {
	i := strings.Index(text, p.begin)
	if i < 0 {
		return ""
	}
	text = text[i:]
	if j := strings.Index(text, p.end); j >= 0 {
		text = text[:j+len(p.end)]
	}
	return strings.TrimSpace(text) + "\n"
}

// in returns text with section in the place of the part, or at its end if it has none.
func (p part) in(text, section string) string {
	before, after := text, ""
	if was := strings.TrimSpace(p.of(text)); was != "" {
		before, after, _ = strings.Cut(text, was)
	}
	var parts []string
	for _, part := range []string{before, section, after} {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, "\n\n") + "\n"
}

// A page is text that is written line by line.
type page struct{ strings.Builder }

func (b *page) line(format string, a ...any) { fmt.Fprintf(b, format+"\n", a...) }

// section is the part, with its lines: what write writes, what could not be measured, and the notes, which are written by hand.
func (p part) section(r *results, notes string, write func(*page)) string {
	var b page
	b.line("%s\n", p.begin)
	write(&b)
	if len(r.errs) > 0 {
		b.line("\nMissing above:\n\n%s", strings.TrimSpace(notMeasured(r)))
	}
	b.line("\n%s\n\n%s", strings.TrimSpace(notes), p.end)
	return b.String()
}

// publish puts a part into the results file. What is not all of it, or not meant, is only printed.
func (c *config) publish(p part, section string) error {
	if c.some || c.quick {
		fmt.Print("\n", section)
		return nil
	}
	was, err := os.ReadFile(c.results)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.WriteFile(c.results, []byte(p.in(string(was), section)), 0o644); err != nil {
		return err
	}
	fmt.Printf("\n%s\nwritten to %s\n", section, c.results)
	return nil
}

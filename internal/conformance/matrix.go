package conformance

import (
	"fmt"
	"slices"
	"strings"
)

// nothingToDo begins the reason of a skip that is no gap: the case is about something that the device has not by its nature.
const nothingToDo = "nothing to do"

// An Outcome is how a case ended.
type Outcome string

const (
	Passed  Outcome = "pass"
	Failed  Outcome = "fail"
	Skipped Outcome = "skip"
)

// A Result is how one case ended on one path.
type Result struct {
	Case, Feature string
	Path, Column  string
	Outcome       Outcome
	Reason        string   `json:",omitempty"` // of a skip
	Log           string   `json:",omitempty"` // of a failure
	Notes         []string `json:",omitempty"` // which of several allowed answers was seen
}

// Where the table goes in a text that has more than that.
const (
	matrixBegin = "<!-- Written by make matrix, from the conformance suite. -->\n"
	matrixEnd   = "<!-- End of what make matrix writes. -->\n"
)

// fitInto puts the table between the marks of text, if it has any.
func fitInto(text, table string) string {
	head, rest, ok := strings.Cut(text, matrixBegin)
	_, tail, ok2 := strings.Cut(rest, matrixEnd)
	if !ok || !ok2 {
		return table
	}
	return head + matrixBegin + "\n" + table + "\n" + matrixEnd + tail
}

// columnOf names the column of a device on a path. The software NIC's paths are code of their own; what the kernel's drivers
// do does not depend on where the peer is.
func columnOf(provider, path string) string {
	if provider == "soft" {
		return "soft, " + path
	}
	return provider
}

// markdown makes the table of features and providers. A cell is "yes" with the number of cases, "most" if cases were skipped,
// a bold gap with the cases that fail, or a dash; with footnotes that say why cases were skipped.
func markdown(all []Result) string {
	all = slices.DeleteFunc(slices.Clone(all), func(r Result) bool { return r.Feature == "" })
	var features, columns, notes []string
	for _, r := range all {
		if !slices.Contains(features, r.Feature) {
			features = append(features, r.Feature)
		}
		if !slices.Contains(columns, r.Column) {
			columns = append(columns, r.Column)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "| feature | %s |\n|---|%s\n", strings.Join(columns, " | "), strings.Repeat("---|", len(columns)))
	for _, f := range features {
		fmt.Fprintf(&b, "| %s |", f)
		for _, col := range columns {
			var good, bad []string // a case counts once, and fails if it fails in one of the two roles
			var skips []string     // reasons
			for _, r := range all {
				if r.Feature != f || r.Column != col {
					continue
				}
				switch r.Outcome {
				case Passed:
					good = addOnce(good, r.Case)
				case Failed:
					bad = addOnce(bad, r.Case)
				case Skipped:
					if !strings.HasPrefix(r.Reason, nothingToDo) {
						skips = addOnce(skips, r.Reason)
					}
				}
			}
			good = slices.DeleteFunc(good, func(n string) bool { return slices.Contains(bad, n) })
			marks := ""
			for _, reason := range skips {
				n := slices.Index(notes, reason)
				if n < 0 {
					n = len(notes)
					notes = append(notes, reason)
				}
				marks += fmt.Sprintf(" \\[%d]", n+1)
			}
			switch {
			case len(bad) > 0:
				fmt.Fprintf(&b, " **%d of %d: not %s**%s |", len(good), len(good)+len(bad), strings.Join(bad, ", "), marks)
			case len(good) > 0 && len(skips) > 0:
				fmt.Fprintf(&b, " most (%d)%s |", len(good), marks)
			case len(good) > 0:
				fmt.Fprintf(&b, " yes (%d) |", len(good))
			default:
				fmt.Fprintf(&b, " -%s |", marks) // without a mark: the path has no such case
			}
		}
		b.WriteString("\n")
	}
	for i, n := range notes {
		fmt.Fprintf(&b, "\n\\[%d] %s  ", i+1, n)
	}
	if len(notes) > 0 {
		b.WriteString("\n")
	}
	return b.String()
}

func addOnce(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

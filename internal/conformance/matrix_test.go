package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
)

// nothingToDo is the reason of a skip that is no gap: the case is about something that the device has not by its nature.
const nothingToDo = "nothing to do"

type outcome string

const (
	passed  outcome = "pass"
	failed  outcome = "fail"
	skipped outcome = "skip"
)

// result is how one case ended on one path.
type result struct {
	Case, Feature string
	Path, Column  string
	Outcome       outcome
	Reason        string   `json:",omitempty"` // of a skip
	Notes         []string `json:",omitempty"` // which of several allowed answers was seen
}

var results []result

// TestZMatrix writes the matrix of what the tests before it have found; it comes last in the file order.
func TestZMatrix(t *testing.T) {
	if *matrixFile == "" {
		t.Skip("no -matrix file")
	}
	all := slices.Clone(results)
	for name := range strings.SplitSeq(*matrixWith, ",") {
		if name == "" {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var more []result
		if err := json.Unmarshal(b, &more); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		all = append(all, more...)
	}
	if strings.HasSuffix(*matrixFile, ".json") {
		out, err := json.MarshalIndent(all, "", "\t")
		if err == nil {
			err = os.WriteFile(*matrixFile, out, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	old, err := os.ReadFile(*matrixFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	text := fitInto(string(old), markdown(all))
	switch {
	case text == string(old):
	case *matrixCheck:
		t.Errorf("%s does not say what the conformance suite has found: `make matrix` writes it anew\n%s", *matrixFile, markdown(all))
	default:
		if err := os.WriteFile(*matrixFile, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
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
func markdown(all []result) string {
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
				case passed:
					good = addOnce(good, r.Case)
				case failed:
					bad = addOnce(bad, r.Case)
				case skipped:
					if r.Reason != "" && r.Reason != nothingToDo {
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

func TestMarkdown(t *testing.T) {
	got := markdown([]result{
		{Case: "a", Feature: "SEND", Column: "soft, in-process", Outcome: passed},
		{Case: "b", Feature: "SEND", Column: "soft, in-process", Outcome: passed},
		{Case: "b", Feature: "SEND", Column: "soft, in-process", Outcome: passed}, // in the other role
		{Case: "a", Feature: "SEND", Column: "rxe", Outcome: passed},
		{Case: "a", Feature: "SEND", Column: "rxe", Outcome: failed},
		{Case: "b", Feature: "SEND", Column: "rxe", Outcome: passed},
		{Case: "c", Feature: "SRQ", Column: "soft, in-process", Outcome: passed},
		{Case: "c", Feature: "SRQ", Column: "rxe", Outcome: skipped, Reason: "the device does not have srq"},
		{Case: "d", Feature: "MW", Column: "soft, in-process", Outcome: skipped, Reason: nothingToDo},
		{Case: "d", Feature: "MW", Column: "rxe", Outcome: passed},
		{Case: "e", Feature: "MW", Column: "rxe", Outcome: skipped, Reason: "it crashes"},
	})
	want := `| feature | soft, in-process | rxe |
|---|---|---|
| SEND | yes (2) | **1 of 2: not a** |
| SRQ | yes (1) | - \[1] |
| MW | - | most (1) \[2] |

\[1] the device does not have srq  
\[2] it crashes  
`
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	text := "head\n" + matrixBegin + "old\n" + matrixEnd + "tail\n"
	if got, want := fitInto(text, "new\n"), "head\n"+matrixBegin+"\nnew\n\n"+matrixEnd+"tail\n"; got != want || fitInto(got, "new\n") != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got := fitInto("something else", "new\n"); got != "new\n" {
		t.Errorf("got %q", got)
	}
}

package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

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
	var out []byte
	if strings.HasSuffix(*matrixFile, ".json") {
		out, _ = json.MarshalIndent(all, "", "\t")
	} else {
		out = []byte(markdown(all))
	}
	if err := os.WriteFile(*matrixFile, out, 0o644); err != nil {
		t.Fatal(err)
	}
}

// markdown makes the table of features and providers. A cell is "yes" with the number of cases, a bold gap with the
// cases that fail, or a dash with a footnote that says why the feature was skipped.
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
			reason := ""
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
					reason = r.Reason
				}
			}
			good = slices.DeleteFunc(good, func(n string) bool { return slices.Contains(bad, n) })
			switch {
			case len(bad) > 0:
				fmt.Fprintf(&b, " **%d of %d: not %s** |", len(good), len(good)+len(bad), strings.Join(bad, ", "))
			case len(good) > 0:
				fmt.Fprintf(&b, " yes (%d) |", len(good))
			case reason != "":
				n := slices.Index(notes, reason)
				if n < 0 {
					n = len(notes)
					notes = append(notes, reason)
				}
				fmt.Fprintf(&b, " - [%d] |", n+1)
			default:
				b.WriteString(" - |") // the path has no such case
			}
		}
		b.WriteString("\n")
	}
	for i, n := range notes {
		fmt.Fprintf(&b, "\n[%d] %s", i+1, n)
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
		{Case: "a", Feature: "SEND", Column: "soft/in-process", Outcome: passed},
		{Case: "b", Feature: "SEND", Column: "soft/in-process", Outcome: passed},
		{Case: "b", Feature: "SEND", Column: "soft/in-process", Outcome: passed}, // in the other role
		{Case: "a", Feature: "SEND", Column: "rxe/in-process", Outcome: passed},
		{Case: "a", Feature: "SEND", Column: "rxe/in-process", Outcome: failed},
		{Case: "b", Feature: "SEND", Column: "rxe/in-process", Outcome: passed},
		{Case: "c", Feature: "SRQ", Column: "soft/in-process", Outcome: passed},
		{Case: "c", Feature: "SRQ", Column: "rxe/in-process", Outcome: skipped, Reason: "the device does not have srq"},
	})
	want := `| feature | soft/in-process | rxe/in-process |
|---|---|---|
| SEND | yes (2) | **1 of 2: not a** |
| SRQ | yes (1) | - [1] |

[1] the device does not have srq
`
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

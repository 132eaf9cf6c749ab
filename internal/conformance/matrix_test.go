package conformance

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestZMatrix writes the matrix of what the tests before it have found: those of main_test.go, among others, since files go by their names.
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
		var more []Result
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

func TestMarkdown(t *testing.T) {
	got := markdown([]Result{
		{Case: "a", Feature: "SEND", Column: "soft, in-process", Outcome: Passed},
		{Case: "b", Feature: "SEND", Column: "soft, in-process", Outcome: Passed},
		{Case: "b", Feature: "SEND", Column: "soft, in-process", Outcome: Passed}, // in the other role
		{Case: "a", Feature: "SEND", Column: "rxe", Outcome: Passed},
		{Case: "a", Feature: "SEND", Column: "rxe", Outcome: Failed},
		{Case: "b", Feature: "SEND", Column: "rxe", Outcome: Passed},
		{Case: "c", Feature: "SRQ", Column: "soft, in-process", Outcome: Passed},
		{Case: "c", Feature: "SRQ", Column: "rxe", Outcome: Skipped, Reason: "the device does not have srq"},
		{Case: "d", Feature: "MW", Column: "soft, in-process", Outcome: Skipped, Reason: nothingToDo + ": it has none"},
		{Case: "d", Feature: "MW", Column: "rxe", Outcome: Passed},
		{Case: "e", Feature: "MW", Column: "rxe", Outcome: Skipped, Reason: "it crashes"},
		{Case: "f", Column: "siw", Outcome: Failed}, // no row's
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

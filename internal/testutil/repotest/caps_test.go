package repotest

import (
	"regexp"
	"testing"
)

// Every feature that a program can ask for is one that some device can have: otherwise who asks before use never uses it.
func TestCapsAreSet(t *testing.T) {
	all, err := files()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, s := range all {
		if s.name == "verbs/ib/attr.go" {
			for _, m := range regexp.MustCompile(`(?m)^\t(Cap[A-Z]\w*)`).FindAllSubmatch(s.text, -1) {
				names[string(m[1])] = true
			}
		}
	}
	if len(names) == 0 {
		t.Fatal("no features found")
	}
	set := regexp.MustCompile(`\bib\.(Cap[A-Z]\w*)`)
	for _, s := range all {
		if s.isTest() || !under(s.folder, "internal/provider") && !under(s.folder, "internal/uverbs") && !under(s.folder, "internal/softnic") {
			continue
		}
		for _, m := range set.FindAllSubmatch(s.text, -1) {
			delete(names, string(m[1]))
		}
	}
	for n := range names {
		t.Errorf("no provider knows ib.%s", n)
	}
}

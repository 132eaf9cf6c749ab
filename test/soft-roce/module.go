package main

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// A moduleInfo is what a kernel module says of itself.
type moduleInfo struct {
	name    string
	depends []string
}

// canonical is a module's name as the kernel has it: file names may have hyphens.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// readModuleInfo reads the .modinfo section of a module, which is what depmod reads, too.
func readModuleInfo(ko []byte) (moduleInfo, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return moduleInfo{}, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return moduleInfo{}, fmt.Errorf("no section .modinfo: not a kernel module")
	}
	text, err := s.Data()
	if err != nil {
		return moduleInfo{}, err
	}
	return parseModuleInfo(text), nil
}

func parseModuleInfo(text []byte) moduleInfo {
	var m moduleInfo
	for entry := range strings.SplitSeq(string(text), "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch key {
		case "name":
			m.name = canonical(value)
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					m.depends = append(m.depends, canonical(d))
				}
			}
		}
	}
	return m
}

// A moduleGraph says for each module which modules it needs. Its text form is that of modules.dep with bare names.
type moduleGraph map[string][]string

func (g moduleGraph) encode() []byte {
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(g)) {
		fmt.Fprintf(&b, "%s: %s\n", name, strings.Join(g[name], " "))
	}
	return b.Bytes()
}

func parseModuleGraph(text []byte) (moduleGraph, error) {
	g := moduleGraph{}
	for in := bufio.NewScanner(bytes.NewReader(text)); in.Scan(); {
		name, deps, ok := strings.Cut(in.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("modules.dep: %q has no colon", in.Text())
		}
		g[name] = strings.Fields(deps)
	}
	return g, nil
}

// order returns the modules to load for those that are wanted, each after all that it needs.
func (g moduleGraph) order(wanted ...string) ([]string, error) {
	var all []string
	const open, done = 1, 2
	state := map[string]int{}
	var visit func(name, by string) error
	visit = func(name, by string) error {
		name = canonical(name)
		switch state[name] {
		case done:
			return nil
		case open:
			return fmt.Errorf("module %s needs itself, by way of %s", name, by)
		}
		deps, ok := g[name]
		if !ok {
			return fmt.Errorf("module %s, needed by %s, is not in the image", name, by)
		}
		state[name] = open
		for _, d := range deps {
			if err := visit(d, name); err != nil {
				return err
			}
		}
		state[name] = done
		all = append(all, name)
		return nil
	}
	for _, w := range wanted {
		if err := visit(w, "the set-up"); err != nil {
			return nil, err
		}
	}
	return all, nil
}
